assign q = 0;
initial forever ;
endmodule
